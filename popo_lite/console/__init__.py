"""What a person sees: live view, plain log, tables and reports. The only importer of rich."""
