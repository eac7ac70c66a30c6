// Bundles the page into dist/, or with --tests the tests into .test/ (Node runs no TypeScript by itself).
import { readdirSync, mkdirSync, copyFileSync, rmSync } from "node:fs";
import { build } from "esbuild";

const common = { bundle: true, format: "esm", target: "es2022", logLevel: "warning" };

if (process.argv.includes("--tests")) {
  rmSync(".test", { recursive: true, force: true });
  const entryPoints = readdirSync("test").filter((name) => name.endsWith(".test.ts")).map((name) => `test/${name}`);
  await build({ ...common, entryPoints, outdir: ".test", platform: "node", sourcemap: "inline", outExtension: { ".js": ".mjs" } });
} else {
  mkdirSync("dist", { recursive: true });
  await build({ ...common, entryPoints: ["src/main.ts"], outfile: "dist/main.js", minify: true });
  for (const name of readdirSync("static")) copyFileSync(`static/${name}`, `dist/${name}`);
}
