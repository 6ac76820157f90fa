"""What infra/compose.yaml needs beside the images."""
