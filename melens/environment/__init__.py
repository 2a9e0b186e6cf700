"""What melens runs on: versions of the libraries, optional packages, random seeds."""
