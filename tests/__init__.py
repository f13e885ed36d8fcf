import cadd_min  # noqa: F401  # before torch is loaded: see there
