"""The streams of random numbers that one seed gives, numbered here alone so that no two parts draw the same numbers."""

INITIALIZATION = 0  # parameters, and the keys of training steps
ORDER = 1  # of the images in each epoch
EVALUATION = 2  # random starts and proposals of attacks
MASKING = 3  # points of the checks for gradient masking
