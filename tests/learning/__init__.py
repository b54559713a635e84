"""Does feedback teach? One preference at a time, twenty requests in a row, judged by a program on held-out prompts."""
