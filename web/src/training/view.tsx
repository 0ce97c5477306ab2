import { useSignal } from "@preact/signals";
import { useEffect, useMemo, useRef } from "preact/hooks";
import { language, number, t } from "../i18n";
import { decoded, go, href, route } from "../router";
import { Chart, Sparkline, Swatch, axisName, type Line } from "./chart";
import { Configuration } from "./configuration";
import { Samples } from "./samples";
import { formatNumber, isHeldOut, panels, points, type Axis } from "./series";
import { details, MAX_RUNS, problem, refreshDetails, refreshRuns, runs, type Run } from "./state";

const POLL_INTERVAL = 3000; // ms

/**
 * The runs in the address, several for a comparison. Without any, `previous` or else the newest run:
 * of two runs in progress, the newest keeps changing.
 */
function selectedRuns(previous: string | null): string[] {
  const ids = route.value.id?.split(",").map(decoded) ?? [];
  if (ids.length) return ids.slice(0, MAX_RUNS);
  const all = runs.value ?? [];
  const run = all.find((each) => each.id === previous) ?? all[0];
  return run ? [run.id] : [];
}

function address(ids: string[]): string {
  return ids.map((id) => id.replace(/[%,]/g, encodeURIComponent)).join(",");
}

export function TrainingView() {
  const followed = useRef<string | null>(null);
  const ids = selectedRuns(followed.current);
  followed.current = route.value.id === null ? (ids[0] ?? null) : null;
  const key = ids.join("\n");
  useEffect(() => {
    let unmounted = false;
    let timer = 0;
    const poll = async () => {
      if (document.visibilityState === "visible") {
        await refreshRuns();
        await refreshDetails(selectedRuns(followed.current));
      }
      if (!unmounted) timer = window.setTimeout(poll, POLL_INTERVAL);
    };
    void poll();
    return () => {
      unmounted = true;
      clearTimeout(timer);
    };
  }, [key]);
  return (
    <div class="page training">
      <h1>{t("training")}</h1>
      {problem.value && (
        <div class="problem" role="alert">
          {problem.value}
        </div>
      )}
      {runs.value === null ? (
        !problem.value && <p class="note">{t("loading")}</p>
      ) : runs.value.length ? (
        <>
          <RunList ids={ids} />
          <Charts ids={ids} />
          <Samples ids={ids} />
          <Configuration ids={ids} />
        </>
      ) : (
        <div class="empty">
          <h2>{t("noRuns")}</h2>
          <p>{t("noRunsText")}</p>
          <pre>khaosz demo{"\n"}khaosz train recipes/pt.toml</pre>
        </div>
      )}
    </div>
  );
}

function RunList(props: { ids: string[] }) {
  const { ids } = props;
  const toggle = (id: string) => {
    const next = ids.includes(id) ? ids.filter((each) => each !== id) : [...ids, id];
    go("training", next.length ? address(next) : undefined);
  };
  return (
    <ul class="runs" aria-label={t("runs")}>
      {(runs.value ?? []).map((run) => {
        const index = ids.indexOf(run.id);
        const full = index < 0 && ids.length >= MAX_RUNS;
        return (
          <li key={run.id} class={index < 0 ? "" : "open"}>
            <label class="pick" title={full ? t("runLimit") : undefined}>
              <input
                type="checkbox"
                checked={index >= 0}
                disabled={full}
                aria-label={t("compare", { run: run.id })}
                onChange={() => toggle(run.id)}
              />
              {index >= 0 && ids.length > 1 && <Swatch colour={index} />}
            </label>
            <a href={href("training", address([run.id]))} title={t("showRun", { run: run.id })}>
              {run.id}
            </a>
            <span class="stage">{run.stage}</span>
            <span class={`state ${run.state}`}>{t(run.state)}</span>
            <Progress run={run} />
            <span class="curve">
              <Sparkline values={run.curve} label={t("lossCurve")} />
            </span>
            <span class="figures">{summary(run)}</span>
            <time dateTime={new Date(run.updated * 1000).toISOString()}>{ago(run.updated)}</time>
          </li>
        );
      })}
    </ul>
  );
}

function Progress(props: { run: Run }) {
  const { step, steps } = props.run;
  const label =
    steps === null
      ? t("stepAt", { n: number(step ?? 0) })
      : t("stepOf", { n: number(step ?? 0), of: number(steps) });
  return (
    <span class="advance">
      {steps !== null && <progress max={steps || 1} value={step ?? 0} aria-label={label} />}
      <small>{label}</small>
    </span>
  );
}

function summary(run: Run): string {
  const values = [
    ["loss", run.last.loss],
    ["reward", run.last.reward],
    ["accuracy", run.last.val_accuracy ?? run.last.accuracy],
    ["bitsPerByte", run.last.val_bits_per_byte],
  ] as const;
  return values
    .filter(([, value]) => typeof value === "number")
    .map(([name, value]) => `${t(name)} ${formatNumber(value as number)}`)
    .join(" · ");
}

function ago(seconds: number): string {
  const format = new Intl.RelativeTimeFormat(language.value, { numeric: "auto", style: "short" });
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  if (passed < 90) return format.format(-Math.round(passed), "second");
  if (passed < 90 * 60) return format.format(-Math.round(passed / 60), "minute");
  if (passed < 36 * 3600) return format.format(-Math.round(passed / 3600), "hour");
  return format.format(-Math.round(passed / 86400), "day");
}

// A map, since a metric may be called `constructor`.
const titles = new Map<string, Parameters<typeof t>[0]>([
  ["loss", "loss"], ["bits_per_byte", "bitsPerByte"], ["accuracy", "accuracy"], ["reward", "reward"],
  ["kl", "kl"], ["margin", "margin"], ["entropy", "entropy"], ["clip_fraction", "clipFraction"],
  ["explained_variance", "explainedVariance"], ["lr", "learningRate"], ["grad_norm", "gradientNorm"],
  ["tokens_per_s", "tokensPerSecond"], ["mfu", "mfu"],
]); // prettier-ignore

function titleOf(metric: string): string {
  const key = titles.get(metric);
  return key ? t(key) : metric;
}

function Charts(props: { ids: string[] }) {
  const axis = useSignal<Axis>("step");
  const log = useSignal(false);
  const smoothing = useSignal(0.6);
  const known = props.ids.flatMap((id) => {
    const detail = details.value.get(id);
    return detail ? [{ id, ...detail }] : [];
  });
  const rows = known.map((each) => each.rows);
  const charts = useMemo(() => {
    const single = props.ids.length === 1;
    return panels(rows.flat()).map(({ metric, lines }) => ({
      metric,
      lines: known.flatMap((run) =>
        lines.flatMap((name, i): Line[] => {
          const series = points(run.rows, name, axis.value);
          // With several runs, colours distinguish the runs, and languages are omitted.
          if (!series.length || (!single && languageOf(name))) return [];
          const label = single ? labelOf(name) : isHeldOut(name) ? `${run.id}, ${labelOf(name)}` : run.id;
          const part = languageOf(name) ? i + 1 : Number(isHeldOut(name));
          const colour = single ? part % MAX_RUNS : props.ids.indexOf(run.id);
          return [{ key: `${run.id} ${name}`, label, metric: name, colour, points: series }];
        }),
      ),
    }));
  }, [props.ids.join("\n"), language.value, axis.value, ...rows]);
  const range = useMemo((): [number, number] => {
    const xs = charts.flatMap((each) => each.lines.flatMap((line) => line.points.map(({ x }) => x)));
    return xs.length ? [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))] : [0, 1];
  }, [charts]);
  return (
    <section aria-label={t("chart")}>
      <div class="row tuning">
        <label>
          {t("xAxis")}{" "}
          <select
            value={axis.value}
            onChange={(event) => (axis.value = event.currentTarget.value as Axis)}
          >
            {(Object.keys(axisName) as Axis[]).map((each) => (
              <option key={each} value={each}>
                {t(axisName[each])}
              </option>
            ))}
          </select>
        </label>
        <label>
          {t("smoothing")}{" "}
          <input
            type="range"
            min={0}
            max={0.98}
            step={0.02}
            value={smoothing.value}
            onInput={(event) => (smoothing.value = event.currentTarget.valueAsNumber)}
          />
        </label>
        <label class="check">
          <input
            type="checkbox"
            checked={log.value}
            onChange={(event) => (log.value = event.currentTarget.checked)}
          />{" "}
          {t("logScale")}
        </label>
      </div>
      {props.ids.length > 1 && (
        <ul class="legend">
          {props.ids.map((id, i) => (
            <li key={id}>
              <Swatch colour={i} /> {id}
            </li>
          ))}
          <li class="note">
            <Swatch colour={5} held /> {t("heldOut")}
          </li>
        </ul>
      )}
      {known.length > 0 && !charts.length && <p class="note">{t("noMetrics")}</p>}
      <div class="charts">
        {charts.map((each) => (
          <Chart
            key={each.metric}
            title={titleOf(each.metric)}
            lines={each.lines}
            axis={axis.value}
            range={range}
            legend={props.ids.length === 1}
            log={log.value}
            smoothing={smoothing.value}
          />
        ))}
      </div>
    </section>
  );
}

function languageOf(metric: string): string | undefined {
  return /^val_bits_per_byte_(\w+)$/.exec(metric)?.[1];
}

function labelOf(metric: string): string {
  const language = languageOf(metric);
  if (language) return `${t("heldOut")}, ${language}`;
  return t(isHeldOut(metric) ? "heldOut" : "inTraining");
}
