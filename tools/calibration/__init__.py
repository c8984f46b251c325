"""How the general calibration sets are made: sections of free documentation and texts written for them, also drawn."""
