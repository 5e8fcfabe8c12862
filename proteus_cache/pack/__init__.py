"""The pack: a training slice of a cache as plain WebDataset tars and one index, its order, and its loader."""
