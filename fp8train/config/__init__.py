"""The configuration of a run: schema, strict YAML, presets, overrides, and where each value came from."""
