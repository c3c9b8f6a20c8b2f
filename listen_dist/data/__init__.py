"""From files to batches: manifests, shards, decoding, order, text, collation."""
