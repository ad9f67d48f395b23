"""The objectives over pairs of answers, which differ in the loss of a pair; losses/ has these."""
