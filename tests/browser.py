"""A headless Chromium for the site's tests: Debian's own packages, installed where that is possible."""
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager

import pytest

PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver"}
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1280,900")


def ensure():
    """Install what is missing; skips the test, saying why, where that cannot be done."""
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if not missing:
        return
    wanted = " ".join(missing)
    if not shutil.which("apt-get"):
        pytest.skip(f"no browser: {wanted} is not installed, and this system has no apt-get to install it with")
    if os.geteuid():
        pytest.skip(f"no browser: {wanted} is not installed, and only root can do it (apt-get install {wanted})")
    print(f"installing {wanted}")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            pytest.skip(f"no browser: apt-get {command[0]} failed: {done.stdout[-300:]}")


@contextmanager
def chromium(*more):
    """A selenium driver with a profile of its own, which logs the console and every request."""
    ensure()
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}", *more):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        driver.set_page_load_timeout(60)
        try:
            yield driver
        finally:
            driver.quit()
