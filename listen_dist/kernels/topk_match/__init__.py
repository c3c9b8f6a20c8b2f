"""Match an input against a pool of keys and fetch the best k values: see `op.topk_match`."""
