"""Facts about peft's own methods: the only place besides core/bridge.py that knows its insides."""
