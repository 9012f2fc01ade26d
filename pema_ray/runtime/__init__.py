"""The foundation of every room: hardware, clusters, processes, progress, metrics, files. Knows no method."""
