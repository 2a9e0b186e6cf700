"""What is measured of a model: the ME layer, and each of the paper's figures as a function of a `Study`."""
