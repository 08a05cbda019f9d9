"""Beam's runner for Flink with the one fault mended that fills a TaskManager's heap.

Up to Beam 2.75 Flink keeps an entry of state for good each time a splittable DoFn gives the rest
of its work back, since each rest has a name of its own (Beam's issue 27648, mended in 2.76). Where
only an older one is in reach, what a job of this project holds cannot be told from that. So two
classes are made again from Beam's own sources: a rest is named by its place in the bundle, which is
enough since the rests of one key follow each other, and what was taken up again is cleared.

    FlinkCluster(first_jar=mended_jar(folder))
"""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from pipeline.local import jars

_POM = "{http://maven.apache.org/POM/4.0.0}"
_RUNNERS = "org/apache/beam/runners"
_CHANGES = {
    (
        "beam-runners-java-fn-execution",
        f"{_RUNNERS}/fnexecution/control/BundleCheckpointHandlers.java",
    ): (('SDF_PREFIX + ":" + id + ":" + index', 'SDF_PREFIX + ":" + index'),),
    (
        "beam-runners-flink-1.19",
        f"{_RUNNERS}/flink/translation/wrappers/streaming/ExecutableStageDoFnOperator.java",
    ): (
        (
            "        processElement(stateValue);\n      } else {",
            "        keyedStateInternals"
            ".state(namespace, StateTags.value(timerId, residualCoder)).clear();\n"
            "        processElement(stateValue);\n      } else {",
        ),
        # An annotation for a checker, which is in no jar that is needed to run.
        ("import edu.umd.cs.findbugs.annotations.SuppressFBWarnings;\n", ""),
        ('@SuppressFBWarnings("SE_TRANSIENT_FIELD_NOT_RESTORED")\n', ""),
    ),
}
"""By artifact and file, what is replaced there by what."""


def mended(source: str, changes: tuple[tuple[str, str], ...]) -> str:
    """A source with its changes made. Pure.

    Raises:
        AssertionError: One of the places is not there, once.
    """
    for old, new in changes:
        assert source.count(old) == 1, f"Beam's source has another form than 2.70's: {old!r}"
        source = source.replace(old, new)
    return source


def beam_version() -> str:
    """Of the jars that tests start Flink with."""
    pom = ElementTree.parse(Path(jars.__file__).with_name("flink.pom.xml"))
    found = pom.findtext(f".//{_POM}beam.version")
    assert found
    return found


def mended_jar(folder: Path) -> Path:
    """Make a jar with the classes, somewhere in a folder; needs a JDK, and Maven for the sources.

    Raises:
        AssertionError: The sources have another form.
        ServerError: Maven failed.
        subprocess.CalledProcessError: Java's compiler failed.
    """
    version, files = beam_version(), []
    for (artifact, name), changes in _CHANGES.items():
        sources = jars.fetch_with_maven(
            folder / artifact,
            f"the sources of {artifact}",
            [
                "dependency:unpack",
                f"-Dartifact=org.apache.beam:{artifact}:{version}:jar:sources",
            ],
        )
        path = sources / name
        path.write_text(mended(path.read_text(), changes))
        files.append(str(path))
    classes = folder / "classes"
    subprocess.run(
        ["javac", "-nowarn", "-proc:none", "-cp", jars.classpath("flink"), "-d", classes, *files],
        check=True,
        capture_output=True,
    )
    jar = folder / jars.NOT_HANDED_ON / "mended.jar"
    jar.parent.mkdir(parents=True)
    with zipfile.ZipFile(jar, "w") as file:
        for path in sorted(classes.rglob("*.class")):
            file.write(path, path.relative_to(classes))
    return jar
