"""All that is known of model families by name, as data; see `families.FAMILIES`."""
