"""What Flower and Ray do unless they are told not to, and plait tells them: environment variables.

They report their use, look for new versions, install an app's dependencies when it starts, and hide
devices from workers that ask for none. A variable that the user has set stays as it is.
"""

OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
