"""`python -m pema_ray`: the command line, where its script is not on the path."""

from pema_ray.commands.main import main

main()
