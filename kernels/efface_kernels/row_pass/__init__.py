"""The row pass: one look at a chunk of logits."""

from efface_kernels.row_pass.op import RowPassOutput, row_pass

__all__ = ["RowPassOutput", "row_pass"]
