"""What every suite stands on: options and inputs (``shared``), the clock (``timing``), what is printed (``report``)."""
