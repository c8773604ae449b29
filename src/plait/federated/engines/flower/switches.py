"""What Flower and Ray do by default and plait switches off, as environment variables.

They report their use, look for new versions, install an app's dependencies when it starts, and hide
devices from workers that ask for none. A variable that the user has set keeps its value.
"""

OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
