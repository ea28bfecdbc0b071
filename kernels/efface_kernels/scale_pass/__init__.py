"""The scale pass: multiplies a gradient by the upstream scalar and rounds it; skips the work if nothing changes."""
