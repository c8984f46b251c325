"""What data says about weights: second moments of activations, and the rounding that uses them."""
