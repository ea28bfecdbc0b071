"""torchrun that imports what every rank needs once, and forks the ranks: half of their time is imports otherwise."""

from torch.distributed.run import main

import efface.cli.evaluate
import efface.cli.unlearn  # noqa: F401

if __name__ == "__main__":
    main()
