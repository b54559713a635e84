"""The command line of ``cluster``: results on stdout, progress on stderr."""

import argparse
import os
import sys
from pathlib import Path

from cluster import images, nodes
from cluster.layout import NODES, Layout
from cluster.process import ClusterError, say, tails


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster", description="A real Kubernetes of two nodes on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start it, or reuse it; prints the shell's `export` lines")
    end = commands.add_parser("down", help="end it and leave nothing but logs")
    end.add_argument(
        "--images-too", action="store_true", help="also forget the images that the nodes keep between runs"
    )
    commands.add_parser("status", help="say what runs")
    load = commands.add_parser("load", help="import an image archive on nodes that do not have it yet")
    load.add_argument("image", type=Path)
    load.add_argument("node", nargs="*", default=list(NODES), help="default: all nodes")
    execute = commands.add_parser("exec", help="run a command on a node")
    execute.add_argument("node", choices=NODES)
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    logs = commands.add_parser("logs", help="the end of the logs")
    logs.add_argument("component", nargs="*", help="default: all")
    logs.add_argument("--lines", type=int, default=20)
    base = commands.add_parser("base", help="print the name of the base image for `--build-arg BASE=`, made if need be")
    base.add_argument("package", nargs="*", help="further Debian packages in it")
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "up":
                cluster = nodes.up()
                print(f"export KUBECONFIG={cluster.kubeconfig}\nexport PATH={cluster.tools}:$PATH")
                print("# end it: make cluster-down, or python -m cluster down")
            case "down":
                nodes.down(images_too=options.images_too)
            case "status":
                print(nodes.status())
            case "load":
                nodes.load(options.image, options.node)
            case "exec":
                command = [word for position, word in enumerate(options.argv) if position or word != "--"]
                prefix = nodes.enter(options.node)
                os.execvp(prefix[0], [*prefix, *(command or ["bash"])])
            case "base":
                print(images.base(options.package))
            case "logs":
                folder = Layout.default().logs
                files = [folder / name for name in options.component] or sorted(
                    path for path in folder.glob("*") if path.is_file()
                )
                print(tails(files, options.lines).lstrip())
    except (ClusterError, ValueError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; what was being started has ended")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
