"""Defence evaluations: data x attack x defence x metric x seed, a row at a time."""
