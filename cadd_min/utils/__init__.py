"""What every other room may use: errors for people, options from dataclasses, downloads, files of JSON lines."""
