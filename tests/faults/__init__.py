"""Tools that make faults: a network that misbehaves, a clock that is off."""
