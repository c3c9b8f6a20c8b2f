"""A trained model at work: from audio to answers."""
