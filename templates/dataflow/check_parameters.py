"""What the service would refuse of a launch's parameters, one line each: for launch.sh.

Usage: check_parameters.py METADATA NAME=VALUE ...
"""

import json
import re
import sys


def main(metadata, *arguments):
    with open(metadata, encoding="utf-8") as file:
        declared = {one["name"]: one for one in json.load(file)["parameters"]}
    given = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in given:
            print(f"{name} is given twice; give it once")
        if name not in declared:
            print(f"{name} is not a parameter of the template; README.md lists them")
        given[name] = value
    for name, one in declared.items():
        value = given.get(name)
        choices = [choice["value"] for choice in one.get("enumOptions", ())]
        if value is None:
            if not one.get("isOptional"):
                print(f"{name} is missing; {one['helpText']}")
        elif choices and value not in choices:
            print(f"{name}={value} is not allowed; give one of {', '.join(choices)}")
        elif not all(re.fullmatch(regex, value) for regex in one.get("regexes", ())):
            print(f"{name}={value} is not of the form {one['regexes'][0]}; {one['helpText']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
