from fastbeit.cli import run

if __name__ == "__main__":
    run()
