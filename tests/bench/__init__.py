"""How fast small pieces are by themselves: `make bench`.  Whole models are measured by the scripts in bench/."""
