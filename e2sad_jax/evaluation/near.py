"""Which images the later attacks of a cascade leave out, because they lie far from the decision boundary."""

import numpy as np

from e2sad_jax.evaluation.attack import CLEAN, Attack

CONTROL, LEAST = 0.1, 50  # the share of the images that no attack leaves out, and their least number


class Near:
    """Leaves out images far from the decision boundary, and tries on a sample of them whether that was right.

    An attack within eps takes a share s of the label's lead over the other classes. Were the logits linear, the boundary would
    lie at eps / s. The first attack is run on every image. Attack number k + 1 leaves out the images whose boundary lies beyond
    1 + (bound - 1) / k budgets, by the least lead so far: what k attacks have left standing needs to be nearer.

    A tenth of all images, 50 at least, are drawn at random: the control, which no attack leaves out. If an image of the control
    falls though it lies far, no image is left out any more, and what was missed is made up for.
    """

    def __init__(self, bound: float, images: int, seed: int):
        """`bound` is a number of budgets, at least 1; `seed` draws the control."""
        self.bound = bound
        self.control = np.random.default_rng(seed).permutation(images) < max(LEAST, round(CONTROL * images))
        self.wrong = False  # whether an image of the control has fallen though it lies far
        self._clean = np.full(images, np.inf)
        self._least = np.full(images, np.inf)
        self._far: dict[int, np.ndarray] = {}  # by the number of the attack: what stood before it and lies far

    def look(self, attack: Attack, places: np.ndarray, lead: np.ndarray) -> None:
        """Takes note of the label's lead `[B]` at the inputs that an attack has made of the images with these places."""
        leads = self._clean if attack.kind == CLEAN else self._least
        leads[places] = np.fmin(leads[places], lead)

    def left_out(self, number: int, standing: np.ndarray) -> np.ndarray:
        """Which of the images that stand the attack of this number leaves out, bool `[N]`; the first has number 1."""
        if number == 1 or self.wrong:
            return np.zeros_like(standing)
        reach = 1 + (self.bound - 1) / (number - 1)
        with np.errstate(invalid="ignore"):  # infinite leads: nobody knows how far that is
            far = (self._clean - self._least) * reach < self._clean
        self._far[number] = standing & far
        return self._far[number] & ~self.control

    def refuted(self, number: int, standing: np.ndarray) -> bool:
        """Whether the attack of this number was the first to fool an image of the control that lies far."""
        if self.wrong or number not in self._far:
            return False
        self.wrong = bool((self._far[number] & self.control & ~standing).any())
        return self.wrong

    def missed(self, number: int) -> np.ndarray:
        """The images that the attack of this number has left out, bool `[N]`."""
        return self._far[number] & ~self.control

    def left_out_of_any(self, standing: np.ndarray) -> np.ndarray:
        """The images that stand and were left out of an attack, bool `[N]`."""
        nothing = np.zeros_like(standing)
        return nothing if self.wrong else standing & np.any([nothing, *map(self.missed, self._far)], axis=0)
