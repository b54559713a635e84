"""See `learning.command`. (Apart from it: processes of a pool cannot import what lies in `__main__`.)"""

from learning.command import main

if __name__ == "__main__":
    main()
