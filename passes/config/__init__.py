"""What users ask for: settings, presets, configuration files."""
