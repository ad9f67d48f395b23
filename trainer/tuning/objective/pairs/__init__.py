"""The objectives over pairs of answers. They differ in the loss of a pair; losses/ has one file for each."""
