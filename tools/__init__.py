"""Commands around the pack: environment, test hosts, demo, editor, tests. They need nothing but Python itself."""
