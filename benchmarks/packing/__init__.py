"""The pack suite: planning an epoch and assembling its batches."""
