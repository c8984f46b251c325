"""Number formats on plain arrays, each defined once and bit for bit: no tensor names, no disk, no models."""
