"""What each loss, or any other field of a config, buys: the same training with and without it, over several seeds."""
