"""The arms of an experiment: what its traces were sampled by."""

from ads.stage.errors import UserError

ARMS = (
    *("temperature", "ADS", "negative lambda", "random direction", "permuted", "corrupted results"),
    "undistilled",
)
CONTROLS = {  # direction: arm
    "random": "random direction",
    "permuted": "permuted",
    "corrupt": "corrupted results",
}


def arm_of(config):
    """The arm of a trace dataset's settings; sidecars older than the controls have no direction."""
    direction = config.get("direction", "gradient")
    if not config["lam"]:
        return "temperature"
    if direction == "gradient":
        return "ADS" if config["lam"] > 0 else "negative lambda"
    if direction not in CONTROLS:
        raise UserError(f"direction={direction!r}: must be gradient or one of {', '.join(CONTROLS)}")
    return CONTROLS[direction]
