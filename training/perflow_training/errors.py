"""What options and data are refused with; each message names the option, its value and the way out."""


class ConfigError(ValueError):
    """An option that does not exist or a value that it cannot take."""


class DataError(ValueError):
    """An option about data that cannot work, or data that cannot be used."""
