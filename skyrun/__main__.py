from skyrun.cli import main

raise SystemExit(main())
