import { signal, useSignal } from "@preact/signals";
import { useEffect, useMemo, useRef } from "preact/hooks";
import { language, t } from "../i18n";
import { formatNumber, isHeldOut, nearest, scale, smoothed, type Axis, type Point } from "./series";

/** One line of a chart; `colour` is the index of the run's colour, 0 to 5. */
export interface Line {
  key: string;
  label: string;
  metric: string;
  colour: number;
  points: Point[];
}

const HEIGHT = 190;
const LEFT = 52;
const BOTTOM = 22;
const TOP = 8;
const RIGHT = 10;
const TABLE_ROWS = 12; // of the table with the chart's values

/** Position of the crosshair in all charts, and the chart in which it is moved. */
export const cursor = signal<{ x: number; chart: string } | null>(null);

/** Metrics without noise, which are not smoothed. */
const EXACT = new Set(["lr"]);

export function Chart(props: {
  title: string;
  lines: Line[];
  axis: Axis;
  range: [number, number]; // of x
  legend: boolean;
  log: boolean;
  smoothing: number;
}) {
  const { lines, axis } = props;
  const [first, last] = props.range;
  const box = useRef<HTMLDivElement>(null);
  const width = useSignal(0);
  const announcement = useSignal("");
  const valuesAbove = useSignal(false); // when the space below is too small
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => (width.value = Math.floor(entry!.contentRect.width)));
    observer.observe(box.current!);
    return () => observer.disconnect();
  }, []);
  const smoothedLines = useMemo(
    () =>
      lines.map((line) => ({
        ...line,
        smooth:
          isHeldOut(line.metric) || EXACT.has(line.metric)
            ? line.points
            : smoothed(line.points, props.smoothing),
      })),
    [lines, props.smoothing],
  );
  const all = useMemo(() => lines.flatMap((line) => line.points), [lines]);
  const y = useMemo(() => scale(all.map((each) => each.y), 4, props.log), [all, props.log]);
  const inner = Math.max(1, width.value - LEFT - RIGHT);
  const span = last - first || 1;
  const toX = (x: number) => LEFT + (inner * (x - first)) / span;
  const toY = (value: number) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - y.at(value));
  const isDrawable = (point: Point) => !props.log || point.y > 0;
  const path = (points: Point[]) =>
    points
      .filter(isDrawable)
      .map((each, i) => `${i ? "L" : "M"}${toX(each.x).toFixed(1)} ${toY(each.y).toFixed(1)}`)
      .join("");
  const ticks = scale([first, last], Math.max(2, inner / 85)).ticks.filter(
    (each) => each >= first && each <= last,
  );
  const text = (value: number) => formatNumber(value, language.value);
  const axisText = (x: number) =>
    axis === "step" ? t("stepAt", { n: text(x) }) : `${t(axisName[axis])} ${text(x)}`;
  const cursorX = cursor.value === null || !all.length ? null : cursor.value.x;
  const hasCursor = cursorX !== null && cursor.value?.chart === props.title;
  const pointsAtCursor =
    cursorX === null
      ? []
      : smoothedLines.flatMap((line) => {
          const point = nearest(line.points, cursorX);
          return point ? [{ line, point, smooth: nearest(line.smooth, cursorX)! }] : [];
        });
  const onMove = (event: PointerEvent) => {
    const { left, bottom } = box.current!.getBoundingClientRect();
    valuesAbove.value = bottom + 34 + 28 * lines.length > innerHeight;
    const x = first + (span * (event.clientX - left - LEFT)) / inner;
    cursor.value = { x: Math.min(last, Math.max(first, x)), chart: props.title };
  };
  const onKey = (event: KeyboardEvent) => {
    const xs = [...new Set(all.map((each) => each.x))].sort((a, b) => a - b);
    if (!xs.length) return;
    const index = cursorX === null ? xs.length : xs.findLastIndex((x) => x <= cursorX);
    const page = Math.max(1, Math.round(xs.length / 20));
    const target = {
      ArrowLeft: index - 1, ArrowRight: index + 1, PageUp: index + page, PageDown: index - page,
      Home: 0, End: xs.length - 1,
    }[event.key]; // prettier-ignore
    if (target === undefined) {
      if (event.key === "Escape" && cursor.value !== null) {
        event.stopPropagation();
        cursor.value = null;
      }
      return;
    }
    event.preventDefault();
    const x = xs[Math.min(xs.length - 1, Math.max(0, target))]!;
    cursor.value = { x, chart: props.title };
    const values = smoothedLines.flatMap((line) => {
      const point = nearest(line.points, x);
      return point ? [`${line.label} ${text(point.y)}`] : [];
    });
    announcement.value = `${axisText(x)}: ${values.join(", ")}`;
  };
  return (
    <figure class="chart">
      <figcaption>
        {props.title}
        {props.legend &&
          lines.length > 1 &&
          lines.map((line) => (
            <span key={line.key}>
              <Swatch colour={line.colour} held={isHeldOut(line.metric)} /> {line.label}
            </span>
          ))}
      </figcaption>
      <div
        ref={box}
        class="plot"
        tabindex={0}
        role="application"
        aria-roledescription={t("chart")}
        aria-label={t("chartOf", { what: props.title })}
        onPointerMove={onMove}
        onPointerDown={onMove}
        onPointerLeave={() => (cursor.value = null)}
        onKeyDown={onKey}
      >
        <svg width={width.value} height={HEIGHT} aria-hidden="true">
          {y.ticks.map((value) => (
            <g key={value}>
              <line class="rule" x1={LEFT} x2={LEFT + inner} y1={toY(value)} y2={toY(value)} />
              <text class="tick" x={LEFT - 8} y={toY(value) + 4} text-anchor="end">
                {text(value)}
              </text>
            </g>
          ))}
          {ticks.map((value) => (
            <text key={value} class="tick" x={toX(value)} y={HEIGHT - 5} text-anchor="middle">
              {text(value)}
            </text>
          ))}
          {smoothedLines.map((line) =>
            isHeldOut(line.metric) ? (
              <g key={line.key} class={`line held c${line.colour}`}>
                <path d={path(line.points)} />
                {line.points.length <= 100 &&
                  line.points
                    .filter(isDrawable)
                    .map((each) => <circle key={each.x} cx={toX(each.x)} cy={toY(each.y)} r={2.6} />)}
              </g>
            ) : (
              <g key={line.key} class={`line c${line.colour}`}>
                {line.smooth !== line.points && <path class="raw" d={path(line.points)} />}
                <path d={path(line.smooth)} />
              </g>
            ),
          )}
          {cursorX !== null && (
            <g>
              <line class="cross" x1={toX(cursorX)} x2={toX(cursorX)} y1={TOP} y2={HEIGHT - BOTTOM} />
              {pointsAtCursor
                .filter(({ point }) => isDrawable(point))
                .map(({ line, smooth }) => (
                  <circle
                    key={line.key}
                    class={`spot c${line.colour}`}
                    cx={toX(smooth.x)}
                    cy={toY(smooth.y)}
                    r={4}
                  />
                ))}
            </g>
          )}
        </svg>
        {hasCursor && (
          <div class={valuesAbove.value ? "values above" : "values"}>
            <b>{axisText(pointsAtCursor[0]?.point.x ?? cursorX)}</b>
            {pointsAtCursor.map(({ line, point }) => (
              <span key={line.key}>
                <Swatch colour={line.colour} held={isHeldOut(line.metric)} /> {line.label}{" "}
                <b>{text(point.y)}</b>
                {point.x !== pointsAtCursor[0]!.point.x && <small>@ {text(point.x)}</small>}
              </span>
            ))}
          </div>
        )}
      </div>
      <span class="sr-only" role="status" aria-live="polite">
        {announcement.value}
      </span>
      <Table {...props} />
    </figure>
  );
}

export const axisName = { step: "step", tokens: "tokenCount", elapsed_s: "seconds" } as const;

export function Swatch(props: { colour: number; held?: boolean }) {
  return (
    <svg class={`swatch line c${props.colour}${props.held ? " held" : ""}`} viewBox="0 0 22 10" aria-hidden="true">
      <path d="M0 5H22" />
      {props.held && <circle cx="11" cy="5" r="3" />}
    </svg>
  );
}

/** The values of a chart as a table, thinned to a few rows. */
function Table(props: { title: string; lines: Line[]; axis: Axis }) {
  const xs = [...new Set(props.lines.flatMap((line) => line.points.map((each) => each.x)))];
  xs.sort((a, b) => a - b);
  const count = Math.min(TABLE_ROWS, xs.length);
  const rows = Array.from({ length: count }, (_, i) =>
    count === 1 ? xs[0]! : xs[Math.round((i * (xs.length - 1)) / (count - 1))]!,
  );
  return (
    <details class="as-table">
      <summary>{t("asTable")}</summary>
      <div class="wide-table">
        <table>
          <caption class="sr-only">{props.title}</caption>
          <thead>
            <tr>
              <th scope="col">{t(axisName[props.axis])}</th>
              {props.lines.map((line) => (
                <th key={line.key} scope="col">
                  {line.label}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows.map((x) => (
              <tr key={x}>
                <th scope="row">{formatNumber(x, language.value)}</th>
                {props.lines.map((line) => {
                  const point = nearest(line.points, x);
                  return <td key={line.key}>{point ? formatNumber(point.y, language.value) : "–"}</td>;
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}

/** A word-sized line chart. */
export function Sparkline(props: { values: (number | null)[]; label: string }) {
  const values = props.values.filter((each): each is number => each !== null);
  if (values.length < 2) return null;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const step = 96 / (values.length - 1);
  const y = (value: number) => 22 - (20 * (value - low)) / (high - low || 1);
  const path = values.map((value, i) => `${i ? "L" : "M"}${(2 + i * step).toFixed(1)} ${y(value).toFixed(1)}`);
  return (
    <svg class="spark" viewBox="0 0 100 24" role="img" aria-label={props.label}>
      <path d={path.join("")} />
    </svg>
  );
}
