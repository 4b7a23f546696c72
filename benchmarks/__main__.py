from benchmarks.arguments import main

raise SystemExit(main())
