"""Where versions live: the bundle, MLflow, the registered model."""
