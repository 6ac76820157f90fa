"""What a bundle is worth: metrics, intervals, the gate. Pure: nothing here knows MLflow, S3 or disk."""
