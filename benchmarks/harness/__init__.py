"""The base of every suite: options and inputs (``shared``), timing (``timing``) and output (``report``)."""
