"""Show runs and results to a person: live view, plain log, tables, reports. Only this package imports rich."""
