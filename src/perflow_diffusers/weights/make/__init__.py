"""New weights of old ones, from file to file: deltas, LoRAs, smaller and other formats."""
