-- Run once, by the image of PostgreSQL, on an empty volume.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
